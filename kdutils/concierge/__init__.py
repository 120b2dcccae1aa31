"""Study 1's own domain: drawn and recorded clips, the device's program, the file for boards."""
