"""Models: the only room that knows nn.Module. Families as data, walks over blocks, the packed layer."""
