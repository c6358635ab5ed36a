"""Workers of NVIDIA Dynamo."""
