"""Diffusion without networks: noise, timesteps per frame, frame schedules, samplers, guidance."""
