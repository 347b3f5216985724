"""From text to batches: sources, tokenizer, canonical streams, packing, prepared tokens."""
