"""The released 4B model, 480p, as in the reference README. Needs a GPU with 80 GB, or patience."""

model = "kairos-4b-480p"
height = 480
width = 640
num_frames = 81
fps = 16
num_inference_steps = 50
guidance_scale = 5.0
