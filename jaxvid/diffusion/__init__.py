"""Diffusion arithmetic without networks: noise schedules, timesteps per frame, frame schedulers."""
