"""State dicts, fingerprints, and one `.safetensors` file for each adapter."""
