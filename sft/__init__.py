"""Fine-tuning on conversations: Alpaca, Chinese Alpaca and files like them; a chat to try the result."""
