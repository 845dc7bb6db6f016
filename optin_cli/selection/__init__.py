"""Ranking + budget -> mask. numpy only: importing this does not import torch."""
