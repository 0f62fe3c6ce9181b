"""The TSAE: a threshold SAE in the atomic inner product."""
