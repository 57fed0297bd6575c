"""Photos to batches: captions, sizes, crops, order and noise. Loads no models."""
