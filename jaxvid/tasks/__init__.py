"""What is trained: the only room where models, diffusion and losses meet."""
