"""Arithmetic on configurations and on this machine's memory; no torch."""
