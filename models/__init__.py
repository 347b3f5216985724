"""The transformer, its sizes, its Hugging Face form and the arithmetic of its cost."""
