"""kairos-tiny, the model that ships with the package: seconds on any CPU."""

model = "kairos-tiny"
height = 64
width = 64
num_frames = 33
fps = 16
