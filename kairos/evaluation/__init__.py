"""How physical a video is, measured against the simulator and without a learned judge."""
