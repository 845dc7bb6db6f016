"""The files that stages hand to each other: ranking (HDF5), mask (JSON), pruned model record (JSON).

One versioned dataclass an artefact; reading validates, writing is atomic. No torch.
"""
