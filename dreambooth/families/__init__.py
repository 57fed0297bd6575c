"""The families of base models that can be trained. See dreambooth/family.py."""
