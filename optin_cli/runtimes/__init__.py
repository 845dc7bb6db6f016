"""Other runtimes than torch's: models are exported to them, checked, and run by them beside torch."""
