"""Small files of every kind and format version, and the script that made them."""
