"""The families of base models that are trained. See dreambooth/family.py."""
