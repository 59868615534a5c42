"""Speed and memory against the frozen floor and against peers; run from a checkout."""
