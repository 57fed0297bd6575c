"""The methods that this project compares its own with. Each implements dreambooth/method.py."""
