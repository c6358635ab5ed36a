"""The sections of scripts/gpu_proof, one file each: ``prove(proof)`` fills its part of the report."""
