"""HTTP front ends over `service`. No torch here: this process answers while another computes."""
