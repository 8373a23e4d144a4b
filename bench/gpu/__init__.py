"""What is known of the kernels for GPUs without a GPU, and what is measured on one."""
