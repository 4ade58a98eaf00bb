// Main program of emulated launches: arrays from standard input to standard output. The rig puts the
// kernels and a table of them in front: struct Launch and launches[].
//
// Input: int64 launch, blocks x, blocks y, order, rows, then the sizes in bytes of x, codes, scales,
// y and bias, then x, codes, scales and bias. Output: y. Every array ends where a page ends that may
// not be touched.
#include <sys/mman.h>
#include <unistd.h>

static void* guarded(size_t size) {
  const size_t page = sysconf(_SC_PAGESIZE), pages = (size + page - 1) / page * page;
  char* start = (char*)mmap(nullptr, pages + page, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED || mprotect(start + pages, page, PROT_NONE)) exit(4);
  return start + pages - size;
}

static void transfer(void* data, size_t size, bool in) {
  if ((in ? fread(data, 1, size, stdin) : fwrite(data, 1, size, stdout)) != size) exit(5);
}

int main() {
  int64_t head[10];
  transfer(head, sizeof head, true);
  void* arrays[5];
  for (int i = 0; i < 5; ++i) {
    arrays[i] = guarded(head[5 + i]);
    if (i != 3) transfer(arrays[i], head[5 + i], true);
  }
  memset(arrays[3], 0xff, head[8]);
  const Launch& launch = launches[head[0]];
  for (int i = 0; i < 5; ++i) pointers[i] = arrays[i];
  rows = head[4];
  const Index grid = {(unsigned)head[1], (unsigned)head[2], launch.splits};
  const size_t size = launch.image_bytes * grid.y + launch.row_sum_bytes * rows;
  scratch = guarded(size);
  memset(scratch, 0xff, size);
  const char* error = nullptr;
  if (launch.arrange) {
    const Index before = {launch.arrange_blocks, launch.rows / launch.arrange_rows * grid.y, 1};
    error = emulated::run_grid(before, {launch.arrange_threads, 1, 1}, head[3], launch.arrange);
  }
  if (!error) error = emulated::run_grid(grid, {launch.threads, 1, 1}, head[3], launch.run);
  if (!error && launch.add) {
    const Index after = {launch.add_blocks, (unsigned)rows, 1};
    error = emulated::run_grid(after, {launch.add_threads, 1, 1}, head[3], launch.add);
  }
  if (error) {
    fprintf(stderr, "%s\n", error);
    return 3;
  }
  transfer(arrays[3], head[8], false);
}
