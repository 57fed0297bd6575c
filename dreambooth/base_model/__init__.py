"""The frozen base model: loading, prompts to embeddings, photos to latents, and what noise is."""
