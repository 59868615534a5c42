"""State dicts, fingerprints, and one .safetensors file for an adapter."""
