"""The digit study: fine-tune a small network on some digits and measure forgetting."""
