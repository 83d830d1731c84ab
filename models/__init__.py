"""What the network is: presets, the arithmetic of a shape, building with its own initialisation, and the loss."""
