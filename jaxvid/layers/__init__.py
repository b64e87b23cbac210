"""The small parts that models and mixers are made of."""
