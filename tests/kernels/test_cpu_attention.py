"""What is particular to attention in plain PyTorch: its tiles, its bfloat16 products, and the memory it takes."""
