"""What runs leave behind: files, the environment, figures."""
