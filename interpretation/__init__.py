"""What an adapter did to a model: numbers, pictures, and what each of its parts is for. See docs/interpretation.md."""
