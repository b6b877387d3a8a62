"""How close generated samples are to real ones."""
