"""Masked token modelling without networks: schedules, parallel decoding, conditions of pixels."""
