"""The pipeline: plans, the loops that quantize, studies of float models, and serving."""
