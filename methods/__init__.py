"""The methods that this project compares its own with, each behind the seam in dreambooth/method.py."""
