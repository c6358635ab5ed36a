"""echo-trt as a backend of NVIDIA Dynamo, which serves many workers as one model. Dynamo itself is imported late."""
