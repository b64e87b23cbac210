"""Small layers and functions shared by models and mixers."""
