"""Parts of scripts/pictures.py."""
