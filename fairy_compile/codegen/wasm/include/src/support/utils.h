// TVM sources that are compiled here include this header and use nothing of it.
#pragma once
