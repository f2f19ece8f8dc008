"""What several ops share: launching, autograd, graphs, and kernels over rows, heads and logits."""
