"""Data for training and evaluation: built from annotations, and checked before it is used."""
