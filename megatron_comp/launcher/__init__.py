"""Ranks on this machine, their network, and the tables and JSON that they leave."""
