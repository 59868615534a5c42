"""The optional native extension: one fused autograd node in C++."""
