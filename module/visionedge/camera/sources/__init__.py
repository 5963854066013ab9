"""Sources of pictures: streams, files, folders, devices and HTTP, and the reasons why they fail."""
