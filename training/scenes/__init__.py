"""Generated scenes with exact truth: `raycast` (3-D rooms and streets), `layered` (2-D cut-outs), `make` (shards).

Pictures are uint8, depth is along the optical axis, flow is in pixels (u right, v down), masks are bool.
"""
