"""Exercise 01: explain the mathematics.

LoRA leaves the weight W, of shape (out, in), as it is and adds an update of low rank to it:

    y = W x + s B A x,   A of shape (r, in),   B of shape (out, r),   s = lora_alpha / r

Replace each None by a number, or by an expression that computes it. Then: minipeft learn check 01
"""

# A weight of 1024 x 1024: how many numbers does full fine-tuning train in it?
full_numbers = None

# LoRA with r = 8 on that weight: how many numbers do A and B have together?
lora_numbers = None

# How many times fewer is that?
times_fewer = None

# lora_alpha = 32 and r = 8: by what is B A x multiplied?
scaling = None

# r is doubled and lora_alpha stays: by what is the scaling multiplied?
scaling_after_doubling_r = None

# B is (6, 2) and A is (2, 5): what is the largest rank that B A can have?
largest_rank = None

# B starts at zero and A at random: by how much does the first output differ from the base layer's?
first_difference = None

# One step by hand: s = 2, A = [[1, 1]], B = [[0], [0]], x = [1, 2]. The gradient of the loss in y is [1, -1].
# What is the first number of B's gradient?
gradient_of_B = None

# And in the same step, the first number of A's gradient?
gradient_of_A = None

# A weight of a single number: W = 2, A = 0.5, B = 3, lora_alpha = 8, r = 4. What is the merged weight?
merged = None
