"""The mathematics of training: pure tensors, no files, no sockets, no models."""
