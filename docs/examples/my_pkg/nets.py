"""A model of one's own: any nn.Module."""

from torch import Tensor, nn


class MyNet(nn.Module):
    """A perceptron over 8×8 images. A parameter named ``task`` would be given the task (its ``input_shape``, its ``outputs``)."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, width), nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.fc2(self.fc1(inputs.flatten(1)).relu()).relu())
