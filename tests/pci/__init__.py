"""PCI functions as a driver sees them: the same tests on the software machine, on type1 and on iommufd."""
