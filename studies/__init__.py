"""Studies: many ordinary runs that differ in a few options, and what they show together. No run knows of them."""
